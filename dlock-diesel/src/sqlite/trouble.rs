//! Errors on their way through SQL.

use diesel::result::{DatabaseErrorInformation, DatabaseErrorKind, Error as DieselError};
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::{BigInt, Text};
use diesel::sqlite::Sqlite as SqliteBackend;
use dlock_core::Sqlite;

/// Why an SQL function of dlock failed: a message, and the constraint that the core is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trouble {
    constraint: Option<&'static str>,
    message: String,
}

impl Trouble {
    /// There can be no locks here.
    pub(super) fn unsupported(message: impl Into<String>) -> Self {
        Self {
            constraint: Some(Sqlite::UNSUPPORTED),
            message: message.into(),
        }
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

    /// SQLite hands on the text of an error and nothing else, so that the constraint stands before it.
    fn to_text(&self) -> String {
        match self.constraint {
            Some(constraint) => format!("{constraint}: {}", self.message),
            None => self.message.clone(),
        }
    }
}

impl From<Trouble> for DieselError {
    fn from(trouble: Trouble) -> Self {
        DieselError::DatabaseError(DatabaseErrorKind::Unknown, Box::new(trouble))
    }
}

impl DatabaseErrorInformation for Trouble {
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

const NOT_ENABLED: &str = "this connection cannot take locks yet: call `conn.enable_advisory_locks()` on it once, right \
    after it was opened (in a pool: for each connection, where the pool lets new ones be set up)";

/// Whether dlock's functions are missing.
pub(super) fn is_not_enabled(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(_, info) => {
            info.message().starts_with("no such function: dlock_")
        }
        _ => false,
    }
}

/// The error of a statement of the core in words that help, and with its constraint.
///
/// SQLite has one error code for all that is wrong with a statement, and never translates its messages.
pub(crate) fn explain(error: DieselError) -> DieselError {
    let DieselError::DatabaseError(_, info) = &error else {
        return error;
    };
    let message = info.message();
    if is_not_enabled(&error) {
        return Trouble::unsupported(NOT_ENABLED).into();
    }
    for constraint in [Sqlite::UNSUPPORTED, Sqlite::DEADLOCK] {
        let rest = message.strip_prefix(constraint);
        if let Some(message) = rest.and_then(|rest| rest.strip_prefix(": ")) {
            return DieselError::from(Trouble {
                constraint: Some(constraint),
                message: message.to_owned(),
            });
        }
    }
    error
}

/// What an SQL function of dlock returns.
#[derive(Debug)]
pub(super) struct Reply<T>(pub(super) Result<T, Trouble>);

impl ToSql<BigInt, SqliteBackend> for Reply<i64> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, SqliteBackend>) -> serialize::Result {
        match &self.0 {
            Ok(number) => ToSql::<BigInt, SqliteBackend>::to_sql(number, out),
            Err(trouble) => Err(trouble.to_text().into()),
        }
    }
}

impl ToSql<Text, SqliteBackend> for Reply<String> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, SqliteBackend>) -> serialize::Result {
        match &self.0 {
            Ok(text) => ToSql::<Text, SqliteBackend>::to_sql(text, out),
            Err(trouble) => Err(trouble.to_text().into()),
        }
    }
}
