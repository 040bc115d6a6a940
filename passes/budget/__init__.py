"""A budget for memory: what is computed part by part so that the peak fits, chosen, applied and checked."""
