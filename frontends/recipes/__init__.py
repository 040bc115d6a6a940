"""IR recipes that several importers share: reshapes by sizes, products by rank, quotients, orders."""
