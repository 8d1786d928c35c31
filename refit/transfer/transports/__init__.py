"""What moves parcels of bytes between ranks: the seam, and every transport behind it."""
