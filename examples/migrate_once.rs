//! Every copy of an application runs this when it starts. One copy applies each migration.
//!
//! `DATABASE_URL=.. cargo run --example migrate_once`

use std::process::ExitCode;
use std::time::Duration;

use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
use support::{Connect, Database};

mod support;

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../dlock-diesel/examples/migrations");

fn main() -> ExitCode {
    let database = Database::from_env();
    support::exit_code(support::on_database!(database, migrate), 1)
}

fn migrate<C>(url: &str) -> support::Result<ExitCode>
where
    C: Connect + MigrationHarness<C::Backend>,
{
    let mut conn = support::connect::<C>(url)?;
    // The namespace is the application's name: all databases of a MySQL server share lock names.
    let key = LockKey::namespaced("dlock example", "migrations");
    let lock = conn.advisory_lock(key).timeout(Duration::from_secs(60));
    match lock.run_pending_migrations(MIGRATIONS) {
        Ok(versions) if versions.is_empty() => println!("nothing to apply"),
        Ok(versions) => versions
            .iter()
            .for_each(|version| println!("applied {version}")),
        Err(error) => match Error::find(&*error) {
            Some(Error::Timeout { .. }) => {
                return Err(format!("another process is still migrating: {error}").into());
            }
            _ => return Err(error),
        },
    }
    Ok(ExitCode::SUCCESS)
}
