"""`dvd plan`: the number of workers that a load needs."""
