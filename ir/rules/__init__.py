"""Rules of ops: axis rules as text, dtype rules, rules for blocks, and the common factors of the axes of two shapes."""
