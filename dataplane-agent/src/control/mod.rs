//! The tradesmen's entrance: fills the stores that the rooms read. Nothing calls it.
