"""What a launch needs of the machine: the card, what is chosen for it, launches as data, programs of them, memory."""
