"""What is asked, and when an answer is right."""
