"""Text that the project generates itself: English-German pairs about numbers, and English about everyday things."""
