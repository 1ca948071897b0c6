"""The looped model: configuration, layers, cache, modelling and generation (Ouro sections 3 and 4.1)."""
