"""Who answers: scoring, continuations and generation of a model."""
