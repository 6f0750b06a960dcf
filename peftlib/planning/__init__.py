"""What an injection would do and cost, said before it is done."""
