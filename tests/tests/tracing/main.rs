//! What the feature `tracing` of both crates shows to a subscriber.
#![allow(
    clippy::duplicate_mod,
    reason = "the cases are written once, for sync and for async connections"
)]

mod asynchronous;
mod collect;
mod sync;
