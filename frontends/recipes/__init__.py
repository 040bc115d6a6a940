"""What more than one importer spells in ops of ours: reshapes by sizes, products by rank, quotients, orders."""
