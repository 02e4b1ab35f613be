//! What `dlock-diesel-async` promises, on real servers.

mod acquire;
mod cancellation;
mod dropped_guards;
mod guard;
mod outer_guards;
mod pools;
mod round_trips;
mod runtimes;
mod support;
mod transaction;
mod waiting;
