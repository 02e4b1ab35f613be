//! Which errors the closures of `run` and `transaction` may return, and how dlock's own is found in them.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use diesel::{MysqlConnection, PgConnection, QueryResult};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_core::proto::{Aftermath, Cause, Failure, Reason};
use dlock_diesel::{Error, LockKey};

/// The error of an application in another crate, which knows Diesel and not dlock.
#[derive(Debug)]
enum AppError {
    Database(diesel::result::Error),
    Own,
}

impl From<diesel::result::Error> for AppError {
    fn from(error: diesel::result::Error) -> Self {
        Self::Database(error)
    }
}

impl fmt::Display for AppError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the application failed")
    }
}

impl StdError for AppError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Database(error) => Some(error),
            Self::Own => None,
        }
    }
}

/// As a lock returns it.
fn timeout() -> Error {
    let failure = Failure {
        reason: Reason::Timeout {
            waited: Duration::from_millis(250),
            holders: Vec::new(),
        },
        aftermath: Aftermath::Clean,
        cause: Cause::default(),
        key: None,
    };
    dlock_diesel::shared::failed(failure, &LockKey::from("report")).1
}

/// A conflict is 409 to a web service.
fn status(error: &(dyn StdError + 'static)) -> u16 {
    match Error::find(error) {
        Some(Error::Timeout { .. }) => 409,
        _ => 500,
    }
}

#[test]
fn a_timeout_is_found_in_whatever_it_was_made_into() {
    let of_diesel = || diesel::result::Error::from(timeout());
    assert_eq!(status(&timeout()), 409);
    assert_eq!(status(&of_diesel()), 409);
    assert_eq!(status(&AppError::from(of_diesel())), 409);
    assert_eq!(status(&AppError::Own), 500);
    assert_eq!(status(&diesel::result::Error::NotFound), 500);

    let boxed: Box<dyn StdError + Send + Sync> = of_diesel().into();
    assert_eq!(status(&*boxed), 409);
    let boxed: Box<dyn StdError> = AppError::from(of_diesel()).into();
    assert_eq!(status(&*boxed), 409);

    let contexts = [
        anyhow::Error::from(timeout()),
        anyhow::Error::from(of_diesel()),
        anyhow::Error::from(AppError::from(of_diesel())),
    ];
    for error in contexts {
        assert_eq!(status(error.as_ref()), 409);
        assert_eq!(status(error.context("the report failed").as_ref()), 409);
    }
}

#[test]
fn an_error_of_dlock_comes_back_out_of_an_error_of_diesel_without_loss() {
    match Error::from(diesel::result::Error::from(timeout())) {
        Error::Timeout {
            key,
            waited,
            holders,
            ..
        } => {
            assert_eq!(key, LockKey::from("report"));
            assert_eq!((waited, holders.len()), (Duration::from_millis(250), 0));
        }
        other => panic!("{other:?}"),
    }
    let own = Error::from(diesel::result::Error::NotFound);
    assert!(
        matches!(own, Error::Database(diesel::result::Error::NotFound)),
        "{own:?}"
    );
}

type Boxed = Box<dyn StdError + Send + Sync>;

/// It need only compile.
macro_rules! closures_of {
    (sync $name:ident: $Conn:ty) => {
        #[expect(dead_code, reason = "it need only compile")]
        fn $name(conn: &mut $Conn) -> Result<(), Boxed> {
            use dlock_diesel::AdvisoryLockExt;
            conn.advisory_lock("a").run(|_| QueryResult::Ok(()))?;
            conn.advisory_lock("a").run(|_| Ok::<_, Error>(()))?;
            conn.advisory_lock("a").run(|_| Ok::<_, AppError>(()))?;
            conn.advisory_lock("a").run(|_| anyhow::Ok(()))?;
            conn.advisory_lock("a").run(|_| Ok::<_, Boxed>(()))?;
            conn.advisory_lock("a")
                .transaction(|_| QueryResult::Ok(()))?;
            conn.advisory_lock("a")
                .transaction(|_| Ok::<_, Error>(()))?;
            conn.advisory_lock("a")
                .transaction(|_| Ok::<_, AppError>(()))?;
            conn.advisory_lock("a").transaction(|_| anyhow::Ok(()))?;
            conn.advisory_lock("a").transaction(|_| Ok::<_, Boxed>(()))
        }
    };
    (async $name:ident: $Conn:ty) => {
        #[expect(dead_code, reason = "it need only compile")]
        async fn $name(conn: &mut $Conn) -> Result<(), Boxed> {
            use dlock_diesel_async::AdvisoryLockExt;
            conn.advisory_lock("a")
                .run(async |_| QueryResult::Ok(()))
                .await?;
            conn.advisory_lock("a")
                .run(async |_| Ok::<_, Error>(()))
                .await?;
            conn.advisory_lock("a")
                .run(async |_| Ok::<_, AppError>(()))
                .await?;
            conn.advisory_lock("a")
                .run(async |_| anyhow::Ok(()))
                .await?;
            conn.advisory_lock("a")
                .run(async |_| Ok::<_, Boxed>(()))
                .await?;
            conn.advisory_lock("a")
                .transaction(async |_| QueryResult::Ok(()))
                .await?;
            conn.advisory_lock("a")
                .transaction(async |_| Ok::<_, Error>(()))
                .await?;
            conn.advisory_lock("a")
                .transaction(async |_| Ok::<_, AppError>(()))
                .await?;
            conn.advisory_lock("a")
                .transaction(async |_| anyhow::Ok(()))
                .await?;
            conn.advisory_lock("a")
                .transaction(async |_| Ok::<_, Boxed>(()))
                .await
        }
    };
}

closures_of!(sync sync_postgres: PgConnection);
closures_of!(sync sync_mysql: MysqlConnection);
closures_of!(async async_postgres: AsyncPgConnection);
closures_of!(async async_mysql: AsyncMysqlConnection);

/// Code that is written against an enum of connections takes the lock on a second connection, or inside a match.
mod any {
    use super::*;
    use diesel::Connection;
    use dlock_diesel::AdvisoryLockExt;

    #[derive(diesel::MultiConnection)]
    enum AnyConnection {
        Postgres(PgConnection),
        Mysql(MysqlConnection),
    }

    #[expect(dead_code, reason = "it need only compile")]
    fn on_a_second_connection(
        any: &mut AnyConnection,
        locks: &mut PgConnection,
    ) -> Result<(), Error> {
        let lock = locks.advisory_lock("a").acquire()?;
        any.transaction(|_any| Ok::<_, Error>(()))?;
        lock.release()?;
        locks
            .advisory_lock("a")
            .run(|_| any.transaction(|_any| Ok(())))
    }

    #[expect(dead_code, reason = "it need only compile")]
    fn inside_a_match(any: &mut AnyConnection) -> Result<(), Error> {
        match any {
            AnyConnection::Postgres(conn) => conn.advisory_lock("a").run(|_| Ok(())),
            AnyConnection::Mysql(conn) => conn.advisory_lock("a").run(|_| Ok(())),
        }
    }
}
