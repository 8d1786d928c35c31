"""Delta refits: of each parcel only the elements whose bits changed since the version that both ends hold."""
