"""From features to numbers: Frechet distance, IS, KID, recall. Knows no network."""
