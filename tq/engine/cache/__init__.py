"""The packed key-value cache: settings, codecs, caches that mlx-lm's models take, and attention over packed tokens."""
