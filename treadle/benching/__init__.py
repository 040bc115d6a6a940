"""`treadle bench`: a model beside the tools that its users come from, each in a process of its own, in turns."""
