"""Memory budgets: runs of steps are computed in parts so that the peak fits; selection, application and checks."""
