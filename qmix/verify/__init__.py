"""Plans proved without the hardware they are for, and on it where it is there."""
