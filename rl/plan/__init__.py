"""What a recipe costs before it is paid for: tokens, operations, memory, disk, hours. No weights, no data."""
