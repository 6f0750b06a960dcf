"""What works on the tests: the compatibility matrix, coverage by folder, mutation testing."""
