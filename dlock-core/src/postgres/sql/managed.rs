//! The sessions of a lock manager. The token stands in a setting of the session, which a pooler does not know.

use std::time::Duration;

use crate::proto::manager::Token;
use crate::proto::{Bind, Prepared, Statement};

/// Sets the limits of a session and leaves the token: 1. If another token is there: 0.
///
/// PostgreSQL's limits are milliseconds in 31 bits.
pub(in crate::postgres) fn prepare_managed(lease: Duration, token: Token) -> Statement {
    let millis = i32::try_from(lease.as_millis()).unwrap_or(i32::MAX);
    Statement::number(
        Prepared::Never,
        &[
            "SELECT CASE WHEN pg_catalog.texteq(pg_catalog.current_setting('dlock.session', true), '') IS FALSE \
             AND pg_catalog.texteq(pg_catalog.current_setting('dlock.session', true), ",
            "::pg_catalog.text) IS FALSE THEN 0::pg_catalog.int8 \
             WHEN pg_catalog.set_config('idle_session_timeout', ",
            "::pg_catalog.text, false) IS NOT NULL \
             AND pg_catalog.set_config('idle_in_transaction_session_timeout', ",
            "::pg_catalog.text, false) IS NOT NULL \
             AND pg_catalog.set_config('dlock.session', ",
            "::pg_catalog.text, false) IS NOT NULL THEN 1::pg_catalog.int8 END",
        ],
        [
            Bind::BigInt(token.number()),
            Bind::BigInt(millis.into()),
            Bind::BigInt(millis.into()),
            Bind::BigInt(token.number()),
        ],
    )
}

/// Whether the token is there: 1 or 0.
pub(in crate::postgres) fn is_managed(token: Token) -> Statement {
    Statement::number(
        Prepared::ByText,
        &[
            "SELECT CASE WHEN pg_catalog.texteq(pg_catalog.current_setting('dlock.session', true), ",
            "::pg_catalog.text) IS TRUE THEN 1::pg_catalog.int8 ELSE 0::pg_catalog.int8 END",
        ],
        [Bind::BigInt(token.number())],
    )
}
