//! What the examples share.

use diesel::prelude::*;

mod database;

pub(crate) use database::{Database, Result, cannot_connect, exit_code};

/// Calls a function that is generic over the connection, with the type for `DATABASE_URL` and that URL.
macro_rules! on_database {
    ($function:ident $(, $argument:expr)*) => {
        $crate::support::Database::from_env().and_then(|database| match database {
            $crate::support::Database::Postgres(url) => {
                $function::<diesel::PgConnection>(&url $(, $argument)*)
            }
            $crate::support::Database::Mysql(url) => {
                $function::<diesel::MysqlConnection>(&url $(, $argument)*)
            }
        })
    };
}
pub(crate) use on_database;

pub(crate) fn connect<C: Connection>(url: &str) -> Result<C> {
    C::establish(url).map_err(|error| cannot_connect(url, &error))
}
