//! Live proof of the presets of sqlx: sqlx and dlock keep each other out of the same locks.
//! `DATABASE_URL=postgres://.. cargo run -p dlock-bench --bin sqlx_peer`

use std::env;
use std::error::Error;
use std::process::ExitCode;

use diesel_async::{AsyncConnection as _, AsyncPgConnection};
use dlock_core::LockKey;
use dlock_diesel_async::AdvisoryLockExt as _;
use sqlx_core::Either;
use sqlx_core::connection::Connection as _;
use sqlx_core::migrate::{Migrate as _, MigrateError};
use sqlx_core::query::query;
use sqlx_core::query_scalar::query_scalar;
use sqlx_postgres::{PgAdvisoryLock, PgAdvisoryLockKey, PgConnection};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A lock, as sqlx takes it.
enum Theirs {
    Lock(PgAdvisoryLock),
    /// What a migrator holds while it migrates.
    Migrations,
}

impl Theirs {
    async fn try_acquire(&self, conn: &mut PgConnection) -> Result<bool> {
        match self {
            Self::Lock(lock) => match lock.try_acquire(conn).await? {
                Either::Left(guard) => {
                    guard.leak();
                    Ok(true)
                }
                Either::Right(_) => Ok(false),
            },
            Self::Migrations => match conn.lock().await {
                Ok(()) => Ok(true),
                Err(MigrateError::Execute(error)) if is_lock_timeout(&error) => Ok(false),
                Err(error) => Err(error.into()),
            },
        }
    }

    async fn release(&self, conn: &mut PgConnection) -> Result<()> {
        match self {
            Self::Lock(lock) => {
                let (_, released) = lock.force_release(conn).await?;
                ensure(released, "sqlx does not hold the lock that it has acquired")
            }
            Self::Migrations => Ok(conn.unlock().await?),
        }
    }
}

/// Whether the server has ended a wait, as `lock_timeout` says.
fn is_lock_timeout(error: &sqlx_core::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.as_deref() == Some("55P03")
}

fn ensure(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// Each of the two gets the lock if, and only if, the other one does not hold it.
async fn exclude_each_other(url: &str, theirs: &Theirs, key: &LockKey) -> Result<()> {
    let mut sqlx = PgConnection::connect(url).await?;
    let mut dlock = AsyncPgConnection::establish(url).await?;
    // A migrator only waits.
    query("SET lock_timeout = '300ms'")
        .execute(&mut sqlx)
        .await?;

    ensure(
        theirs.try_acquire(&mut sqlx).await?,
        "sqlx does not get a lock that is free",
    )?;
    ensure(
        dlock.advisory_lock(key).try_acquire().await?.is_none(),
        "dlock gets the lock that sqlx holds",
    )?;
    theirs.release(&mut sqlx).await?;

    let Some(ours) = dlock.advisory_lock(key).try_acquire().await? else {
        return Err("dlock does not get the lock that sqlx has released".into());
    };
    ensure(
        !theirs.try_acquire(&mut sqlx).await?,
        "sqlx gets the lock that dlock holds",
    )?;
    ours.release().await?;

    ensure(
        theirs.try_acquire(&mut sqlx).await?,
        "sqlx does not get the lock that dlock has released",
    )?;
    theirs.release(&mut sqlx).await
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let url = env::var("DATABASE_URL").map_err(|error| format!("DATABASE_URL: {error}"))?;
    let database: String = query_scalar("SELECT current_database()")
        .fetch_one(&mut PgConnection::connect(&url).await?)
        .await?;

    let mut locks = Vec::new();
    for text in [
        "my first Postgres advisory lock!",
        "dlock/sqlx_peer",
        "café",
        "",
    ] {
        locks.push((Theirs::Lock(PgAdvisoryLock::new(text)), LockKey::sqlx(text)));
    }
    for number in [7_262_034_915, -42, i64::MIN] {
        let lock = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(number));
        locks.push((Theirs::Lock(lock), LockKey::sqlx(number)));
    }
    let pair = PgAdvisoryLock::with_key(PgAdvisoryLockKey::IntPair(1, -2));
    locks.push((Theirs::Lock(pair), LockKey::sqlx((1, -2))));
    locks.push((Theirs::Migrations, LockKey::sqlx_migrator(database)));

    let mut code = ExitCode::SUCCESS;
    for (theirs, key) in &locks {
        match exclude_each_other(&url, theirs, key).await {
            Ok(()) => println!("{key}: sqlx and dlock keep each other out"),
            Err(error) => {
                println!("{key}: FAILED: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
