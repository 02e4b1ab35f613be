//! What `dlock-diesel` promises, on real servers.

mod acquire;
mod errors;
mod guard;
mod holders;
mod inside_transaction;
mod names;
mod observe;
mod pool;
mod processes;
mod races;
mod round_trips;
mod settings;
mod support;
mod transaction;
mod waiting;
