//! What the feature `tracing` of both crates shows to a subscriber.

mod asynchronous;
mod collect;
mod sync;
