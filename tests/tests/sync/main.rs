//! What `dlock-diesel` promises, on real servers: here what it alone does, and in `../both` what both crates do.

#[path = "../both/mod.rs"]
mod both;
mod callbacks;
mod dropped_guards;
mod errors;
mod fencing;
mod flavor;
mod managed;
mod names;
mod open_transactions;
mod panics;
mod pool;
mod processes;
mod races;
mod round_trips;
mod settings;
mod support;
