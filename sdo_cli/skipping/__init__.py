"""Skip plans: which blocks of which network calls are computed; the rest hand out what they made before."""
