"""The text form of graphs: printer, scanner and parser."""
