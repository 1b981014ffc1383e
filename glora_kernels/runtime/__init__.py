"""Between the operators and the driver: the card, choices made for it, launches as data, programs, memory."""
