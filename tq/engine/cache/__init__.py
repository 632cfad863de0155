"""Keys and values in fewer bits than mlx-lm keeps them in."""
