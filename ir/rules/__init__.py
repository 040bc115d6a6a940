"""What ops are applied by: axis rules as text, dtype rules, and which axes of one shape make which of another."""
