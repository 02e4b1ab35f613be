//! Errors of dlock's SQL functions. SQLite passes on their text and nothing else.

use std::fmt;

use diesel::result::{DatabaseErrorInformation, DatabaseErrorKind, Error as DieselError};
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::{BigInt, Text};
use diesel::sqlite::Sqlite as SqliteBackend;
use dlock_core::proto::Sqlite;

/// Why an SQL function of dlock failed: a message, and a constraint name by which the core recognizes the kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FunctionError {
    constraint: Option<&'static str>,
    message: String,
}

impl FunctionError {
    /// Locks are not possible here.
    pub(super) fn unsupported(message: impl Into<String>) -> Self {
        Self {
            constraint: Some(Sqlite::UNSUPPORTED),
            message: message.into(),
        }
    }

    /// There are no locks on database files, whatever the file.
    pub(super) fn unsupported_system() -> Self {
        Self::unsupported(
            "dlock has no locks for SQLite files on this operating system, only for databases in memory",
        )
    }

    pub(super) fn deadlock(message: impl Into<String>) -> Self {
        Self {
            constraint: Some(Sqlite::DEADLOCK),
            message: message.into(),
        }
    }

    pub(super) fn other(message: impl Into<String>) -> Self {
        Self {
            constraint: None,
            message: message.into(),
        }
    }

    /// The constraint stands before the message, so that it survives the way through SQLite.
    fn to_text(&self) -> String {
        match self.constraint {
            Some(constraint) => format!("{constraint}: {}", self.message),
            None => self.message.clone(),
        }
    }
}

impl fmt::Display for FunctionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<FunctionError> for DieselError {
    fn from(error: FunctionError) -> Self {
        DieselError::DatabaseError(DatabaseErrorKind::Unknown, Box::new(error))
    }
}

impl DatabaseErrorInformation for FunctionError {
    fn message(&self) -> &str {
        &self.message
    }

    fn details(&self) -> Option<&str> {
        None
    }

    fn hint(&self) -> Option<&str> {
        None
    }

    fn table_name(&self) -> Option<&str> {
        None
    }

    fn column_name(&self) -> Option<&str> {
        None
    }

    fn constraint_name(&self) -> Option<&str> {
        self.constraint
    }

    fn statement_position(&self) -> Option<i32> {
        None
    }
}

const NOT_ENABLED: &str = "this connection cannot take locks yet: call `conn.enable_advisory_locks()` on it once, \
    right after opening it (in a pool: in the hook that sets up new connections)";

/// Whether SQLite does not know dlock's functions on this connection.
pub(super) fn is_not_enabled(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(_, info) => {
            info.message().starts_with("no such function: dlock_")
        }
        _ => false,
    }
}

/// Gives the error of a statement of the core its constraint name back, and a message that says what to do.
///
/// The text of the message tells the kind: SQLite has one error code for everything that is wrong with a statement, and
/// never translates its messages.
pub fn explain(error: DieselError) -> DieselError {
    let DieselError::DatabaseError(_, info) = &error else {
        return error;
    };
    let message = info.message();
    if is_not_enabled(&error) {
        return FunctionError::unsupported(NOT_ENABLED).into();
    }
    for constraint in [Sqlite::UNSUPPORTED, Sqlite::DEADLOCK] {
        let rest = message.strip_prefix(constraint);
        if let Some(message) = rest.and_then(|rest| rest.strip_prefix(": ")) {
            return DieselError::from(FunctionError {
                constraint: Some(constraint),
                message: message.to_owned(),
            });
        }
    }
    error
}

/// The result of an SQL function of dlock.
#[derive(Debug)]
pub(super) struct Reply<T>(pub(super) Result<T, FunctionError>);

impl ToSql<BigInt, SqliteBackend> for Reply<i64> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, SqliteBackend>) -> serialize::Result {
        match &self.0 {
            Ok(number) => ToSql::<BigInt, SqliteBackend>::to_sql(number, out),
            Err(error) => Err(error.to_text().into()),
        }
    }
}

impl ToSql<Text, SqliteBackend> for Reply<String> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, SqliteBackend>) -> serialize::Result {
        match &self.0 {
            Ok(text) => ToSql::<Text, SqliteBackend>::to_sql(text, out),
            Err(error) => Err(error.to_text().into()),
        }
    }
}
