//! What the feature `tracing` shows of locks. Without it, everything here is empty and nothing is compiled in.
//!
//! | where | what |
//! |---|---|
//! | [`Waiting`] | the span `dlock.acquire` around a request, and the event of a wait that passes a second |
//! | [`Releasing`] | the span `dlock.release`, and the event of a lock that was lost before |
//! | [`kept`], [`is_held`], [`on_loss`] | the event of a lock that was lost |
//! | [`session_ended`], [`marked_broken`] | the event of what dlock did to a connection |
//! | [`migrations_wait`] | the event of migrations that wait |
//!
//! `docs/guide/operations.md` has their fields for users.

#[cfg(feature = "tracing")]
mod on;
#[cfg(feature = "tracing")]
mod outcome;
#[cfg(feature = "tracing")]
mod slow;

#[cfg(not(feature = "tracing"))]
mod off;

#[cfg(feature = "tracing")]
pub use on::*;

#[cfg(not(feature = "tracing"))]
pub use off::*;
