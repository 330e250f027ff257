"""The dropout family: public functions with one common signature style."""
