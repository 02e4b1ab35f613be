//! What `dlock-diesel-async` promises, on real servers: here what it alone does, and in `../both` what both crates do.

mod bodies;
#[path = "../both/mod.rs"]
mod both;
mod cancellation;
mod dropped_guards;
mod fencing;
mod flavor;
mod guard;
mod handlers;
mod last_words;
mod managed;
mod manager;
mod open_transactions;
mod outer_guards;
mod panics;
mod pools;
mod races;
mod round_trips;
mod runtimes;
mod semaphores;
mod settings;
mod several;
mod silent;
mod support;
mod sync_crate;
