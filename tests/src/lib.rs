//! What dlock's integration tests stand on: servers that live as long as the test process, a proxy that counts round
//! trips and breaks connections, processes of their own, and a macro that runs one test on every server.
//!
//! A test is written once, generic over the connection:
//!
//! ```no_run
//! use dlock_tests::{Server, TestConnection, on_every_server};
//!
//! on_every_server! {
//!     fn answers<C: TestConnection>(server: &Server) {
//!         assert_eq!(C::open(server).number("SELECT 1"), Some(1));
//!     }
//! }
//! # fn main() {}
//! ```
//!
//! The servers are those that the environment variable `TEST_URLS` (or the file `tests/.env`) names, separated by
//! spaces. Without it, one PostgreSQL and one MySQL or MariaDB are started from the programs found on the machine. Tests
//! of async connections run on those of `TEST_ASYNC_URLS`, if it is set. SQLite needs no server: it is always one more, with
//! a database of its own for each test.

mod async_connection;
mod causes;
mod connection;
mod environment;
mod every;
mod key;
mod pooler;
mod process;
pub mod proof;
mod proxy;
mod server;
mod servers;
mod sqlite;
mod start;
mod wait;

pub use async_connection::AsyncTestConnection;
#[doc(hidden)]
pub use async_connection::block_on;
pub use causes::with_causes;
pub use connection::TestConnection;
#[doc(hidden)]
pub use environment::number_from_environment;
pub use every::{
    run_on, run_on_async, run_on_every_network_server, run_on_every_network_server_async,
    run_on_every_server, run_on_every_server_async, run_on_sqlite,
};
pub use key::unique_key;
pub use pooler::start_transaction_pooler;
pub use process::Process;
pub use proxy::Proxy;
pub use server::{Kind, Server};
pub use servers::{async_servers, servers, servers_from, test_urls};
pub use sqlite::{is_awaited_on_disk, is_claimed_on_disk, is_locked_on_disk, is_waiting_here};
pub use start::{
    start_extra_postgres, start_galera_node, start_lasting_mysql, start_lasting_postgres,
    start_standby_postgres,
};
pub use wait::{PATIENCE, wait_for, wait_for_within};

#[doc(hidden)]
pub use diesel;
#[doc(hidden)]
pub use diesel_async;

/// The Rust examples of the README and the guide are compiled here, because those files lie outside every package.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../README.md")]
    mod readme {}
    #[doc = include_str!("../../docs/guide/README.md")]
    mod guide {}
    #[doc = include_str!("../../docs/guide/waiting.md")]
    mod waiting {}
    #[doc = include_str!("../../docs/guide/transactions.md")]
    mod transactions {}
    #[doc = include_str!("../../docs/guide/several.md")]
    mod several {}
    #[doc = include_str!("../../docs/guide/fencing.md")]
    mod fencing {}
    #[doc = include_str!("../../docs/guide/semaphores.md")]
    mod semaphores {}
    #[doc = include_str!("../../docs/guide/pools.md")]
    mod pools {}
    #[doc = include_str!("../../docs/guide/managed.md")]
    mod managed {}
    #[doc = include_str!("../../docs/guide/async.md")]
    mod asynchronous {}
    #[doc = include_str!("../../docs/guide/sqlite.md")]
    mod sqlite {}
    #[doc = include_str!("../../docs/guide/keys.md")]
    mod keys {}
    #[doc = include_str!("../../docs/guide/errors.md")]
    mod errors {}
    #[doc = include_str!("../../docs/guide/migrations.md")]
    mod migrations {}
    #[doc = include_str!("../../docs/guide/operations.md")]
    mod operations {}
}
