//! A proof under faults: processes that take locks while what they stand on breaks, a history of what each of them
//! believed and when, and a check of that history.
//!
//! - `round` starts the processes, breaks things, and ends with a history.
//! - `worker` is one such process: threads or tasks that take locks and work under them.
//! - `history` is what they write, a line for each event, by one clock of the machine.
//! - `check`(check()) reads a history and lists what must not have happened. It does no I/O.
//! - `picture` draws a piece of a history.

mod admin;
mod check;
mod clock;
mod disk;
mod fault;
mod figures;
mod history;
mod page;
mod picture;
mod random;
mod round;
mod worker;
mod world;

pub use admin::kill_server;
pub use check::{check, check_text};
pub use disk::Disk;
pub use fault::Plan;
pub use figures::Figures;
pub use history::History;
pub use page::table;
pub use picture::picture;
pub use round::{Outcome, Round};
pub use worker::{WorkerOptions, work};
