use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::LockConnection;

pub(crate) trait Killable: LockConnection + 'static {
    /// The statement that ends the session with this id.
    fn kill(id: i64) -> String;
}

impl Killable for AsyncPgConnection {
    fn kill(id: i64) -> String {
        format!("SELECT pg_terminate_backend({id})")
    }
}

impl Killable for AsyncMysqlConnection {
    fn kill(id: i64) -> String {
        format!("KILL {id}")
    }
}
