use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use crate::{Kind, Server, async_servers, servers, sqlite::sqlite_server};

/// Makes tests that run on every one of [`servers`](crate::servers), generic over the connection type.
///
/// A test runs on all servers even if it fails on the first, and then names those that it failed on.
/// A bound may also be a trait of one's own, with [`TestConnection`](crate::TestConnection) as a supertrait, that is
/// implemented for `PgConnection`, `MysqlConnection` and `SqliteConnection`; the server may be `&Server` or `&'static Server`.
#[macro_export]
macro_rules! on_every_server {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident<$Conn:ident: $bound:path>($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            fn body<$Conn: $bound>($server: $Server) $body
            $crate::run_on_every_server(
                body::<$crate::diesel::PgConnection>,
                body::<$crate::diesel::MysqlConnection>,
                body::<$crate::diesel::SqliteConnection>,
            );
        }
    )*};
}

/// As [`on_every_server!`], without SQLite: for what needs a server as a process of its own, whose sessions can be killed
/// and cancelled, whose messages can be counted and held back, and which has users and settings.
#[macro_export]
macro_rules! on_every_network_server {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident<$Conn:ident: $bound:path>($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            fn body<$Conn: $bound>($server: $Server) $body
            $crate::run_on_every_network_server(
                body::<$crate::diesel::PgConnection>,
                body::<$crate::diesel::MysqlConnection>,
            );
        }
    )*};
}

/// Makes tests that run on SQLite.
#[macro_export]
macro_rules! on_sqlite {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            fn body($server: $Server) $body
            $crate::run_on_sqlite(body);
        }
    )*};
}

/// Makes tests that run on every PostgreSQL of [`servers`](crate::servers); there must be one.
#[macro_export]
macro_rules! on_postgres {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            fn body($server: $Server) $body
            $crate::run_on($crate::Kind::Postgres, body);
        }
    )*};
}

/// Makes tests that run on every MySQL and MariaDB of [`servers`](crate::servers); there must be one.
#[macro_export]
macro_rules! on_mysql {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            fn body($server: $Server) $body
            $crate::run_on($crate::Kind::Mysql, body);
        }
    )*};
}

/// What [`on_every_server!`] expands to.
#[doc(hidden)]
#[track_caller]
pub fn run_on_every_server(
    on_postgres: fn(&'static Server),
    on_mysql: fn(&'static Server),
    on_sqlite: fn(&'static Server),
) {
    let on_network = failures(servers(), on_postgres, on_mysql);
    report(on_network.chain(failure(fresh_sqlite(), on_sqlite)));
}

/// What [`on_every_network_server!`] expands to.
#[doc(hidden)]
#[track_caller]
pub fn run_on_every_network_server(
    on_postgres: fn(&'static Server),
    on_mysql: fn(&'static Server),
) {
    report(failures(servers(), on_postgres, on_mysql));
}

/// What [`on_sqlite!`] expands to.
#[doc(hidden)]
#[track_caller]
pub fn run_on_sqlite(on_sqlite: fn(&'static Server)) {
    report(failure(fresh_sqlite(), on_sqlite).into_iter());
}

/// A database for one test: on SQLite, who writes locks the others out.
fn fresh_sqlite() -> &'static Server {
    match sqlite_server() {
        Ok(server) => Box::leak(Box::new(server)),
        Err(message) => panic!("{message}"),
    }
}

/// What [`on_every_server_async!`](crate::on_every_server_async) expands to.
#[doc(hidden)]
#[track_caller]
pub fn run_on_every_server_async(
    on_postgres: fn(&'static Server),
    on_mysql: fn(&'static Server),
    on_sqlite: fn(&'static Server),
) {
    let on_network = failures(async_servers(), on_postgres, on_mysql);
    report(on_network.chain(failure(fresh_sqlite(), on_sqlite)));
}

/// What [`on_every_network_server_async!`](crate::on_every_network_server_async) expands to.
#[doc(hidden)]
#[track_caller]
pub fn run_on_every_network_server_async(
    on_postgres: fn(&'static Server),
    on_mysql: fn(&'static Server),
) {
    report(failures(async_servers(), on_postgres, on_mysql));
}

fn failures(
    servers: &'static [Server],
    on_postgres: fn(&'static Server),
    on_mysql: fn(&'static Server),
) -> impl Iterator<Item = Failure> {
    servers.iter().filter_map(move |server| match server.kind {
        Kind::Postgres => failure(server, on_postgres),
        Kind::Mysql => failure(server, on_mysql),
        Kind::Sqlite => unreachable!("BUG: SQLite is in no list"),
    })
}

/// What [`on_postgres!`] and [`on_mysql!`] expand to.
#[doc(hidden)]
#[track_caller]
pub fn run_on(kind: Kind, body: fn(&'static Server)) {
    run_on_kind(servers(), kind, body);
}

/// What [`on_postgres_async!`](crate::on_postgres_async) and [`on_mysql_async!`](crate::on_mysql_async) expand to.
#[doc(hidden)]
#[track_caller]
pub fn run_on_async(kind: Kind, body: fn(&'static Server)) {
    run_on_kind(async_servers(), kind, body);
}

#[track_caller]
fn run_on_kind(servers: &'static [Server], kind: Kind, body: fn(&'static Server)) {
    let of_kind: Vec<&Server> = servers
        .iter()
        .filter(|server| server.kind == kind)
        .collect();
    assert!(
        !of_kind.is_empty(),
        "none of the servers to test on is {kind}: add one to TEST_URLS, or unset it"
    );
    report(
        of_kind
            .into_iter()
            .filter_map(|server| failure(server, body)),
    );
}

type Failure = (&'static Server, Box<dyn Any + Send>);

fn failure(server: &'static Server, body: fn(&'static Server)) -> Option<Failure> {
    let payload = catch_unwind(AssertUnwindSafe(|| body(server))).err()?;
    // Right below what the panic printed.
    eprintln!("^ on {server}");
    Some((server, payload))
}

#[track_caller]
fn report(failures: impl Iterator<Item = Failure>) {
    let mut failures: Vec<Failure> = failures.collect();
    match failures.len() {
        0 => {}
        // With its own message, for `#[should_panic]`.
        1 => resume_unwind(failures.remove(0).1),
        _ => {
            let names: Vec<String> = failures
                .iter()
                .map(|(server, _)| server.to_string())
                .collect();
            panic!("failed on {}", names.join(", "));
        }
    }
}
