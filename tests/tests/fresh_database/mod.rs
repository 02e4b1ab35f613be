//! A database of its own for a test that makes tables.

use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use dlock_tests::{Kind, Server, TestConnection};
use url::Url;

/// An empty database, dropped together with this.
pub(crate) struct FreshDatabase<C: TestConnection> {
    conn: C,
    name: String,
    /// The server, with the URL of this database.
    pub(crate) server: Server,
}

impl<C: TestConnection> FreshDatabase<C> {
    #[track_caller]
    pub(crate) fn create(server: &Server) -> Self {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_micros());
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let name = format!("dlock_{}_{now:x}_{call}", process::id());
        let mut conn = C::open(server);
        if server.kind == Kind::Sqlite {
            let server = Server {
                url: format!("{}-{name}", server.url),
                ..server.clone()
            };
            return Self { conn, name, server };
        }
        conn.execute_sql(&format!("CREATE DATABASE {name}"));
        let mut url = Url::parse(&server.url).expect("the server's URL");
        url.set_path(&name);
        let server = Server {
            url: url.into(),
            ..server.clone()
        };
        Self { conn, name, server }
    }
}

impl<C: TestConnection> Drop for FreshDatabase<C> {
    fn drop(&mut self) {
        let force = match self.server.kind {
            Kind::Postgres => " WITH (FORCE)",
            Kind::Mysql => "",
            // It goes with its folder.
            Kind::Sqlite => return,
        };
        // A panic here would abort where the test's own unwinds.
        let _ = self
            .conn
            .batch_execute(&format!("DROP DATABASE {}{force}", self.name));
    }
}
