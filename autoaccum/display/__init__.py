"""What people see: views of results in a terminal, and plots in files."""
