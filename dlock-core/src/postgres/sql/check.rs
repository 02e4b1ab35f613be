//! Questions about the server, the session and the way between.

use crate::proto::{Bind, Binds, Columns, Prepared, Statement, unique_nonzero};

macro_rules! fact {
    ($name:literal, $value:expr) => {
        concat!("pg_catalog.concat('", $name, "=', ", $value, ")")
    };
}

macro_rules! setting {
    ($name:literal, $setting:literal) => {
        fact!(
            $name,
            concat!("pg_catalog.current_setting('", $setting, "', true)")
        )
    };
}

macro_rules! lines {
    ($($fact:expr),+ $(,)?) => {
        concat!("pg_catalog.concat_ws(pg_catalog.chr(10)", $(", ", $fact),+, ")")
    };
}

const PRODUCT: &[&str] = &["SELECT pg_catalog.concat('product=', pg_catalog.version())"];

const SETTINGS: &[&str] = &[concat!(
    "SELECT ",
    lines!(
        fact!("id", "pg_catalog.pg_backend_pid()"),
        fact!("recovery", "pg_catalog.pg_is_in_recovery()"),
        setting!("idle_session_timeout", "idle_session_timeout"),
        setting!(
            "idle_in_transaction_session_timeout",
            "idle_in_transaction_session_timeout"
        ),
        setting!("transaction_timeout", "transaction_timeout"),
        setting!("isolation", "default_transaction_isolation"),
        setting!("keepalives_idle", "tcp_keepalives_idle"),
        setting!("keepalives_interval", "tcp_keepalives_interval"),
        setting!("keepalives_count", "tcp_keepalives_count"),
        setting!("user_timeout", "tcp_user_timeout"),
        fact!("client", "pg_catalog.host(pg_catalog.inet_client_addr())"),
    )
)];

const ROLE: &[&str] = &[concat!(
    "SELECT ",
    lines!(
        fact!("id", "pg_catalog.pg_backend_pid()"),
        fact!(
            "stats",
            "pg_catalog.pg_has_role('pg_read_all_stats', 'USAGE')"
        ),
        fact!(
            "signal",
            "pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')"
        ),
        fact!(
            "plpgsql",
            "EXISTS(SELECT FROM pg_catalog.pg_language l WHERE pg_catalog.nameeq(l.lanname, 'plpgsql') \
             AND pg_catalog.has_language_privilege(l.oid, 'USAGE'))"
        ),
        fact!(
            "cluster",
            "(SELECT pg_catalog.min(e.extname::pg_catalog.text) FROM pg_catalog.pg_extension e WHERE \
             pg_catalog.nameeq(e.extname, 'bdr') OR pg_catalog.nameeq(e.extname, 'pgactive') OR \
             pg_catalog.nameeq(e.extname, 'spock') OR pg_catalog.nameeq(e.extname, 'citus'))"
        ),
    )
)];

/// Takes a lock that nobody else has, until the end of the statement's transaction, and looks for it among the locks.
const LOCKS: &[&str] = &[
    concat!(
        "SELECT ",
        lines!(
            fact!("id", "pg_catalog.pg_backend_pid()"),
            fact!("granted", "t.granted"),
            fact!(
                "seen",
                "(SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks l WHERE t.granted AND \
                 pg_catalog.texteq(l.locktype, 'advisory') AND l.granted AND \
                 pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND \
                 pg_catalog.int8eq(l.objid::bigint, t.low))"
            )
        ),
        " FROM (SELECT pg_catalog.pg_try_advisory_xact_lock(k.key) AS granted, \
         pg_catalog.int8and(k.key, 4294967295) AS low FROM (SELECT "
    ),
    "::bigint AS key OFFSET 0) k OFFSET 0) t",
];

/// The name of this statement itself, if it is prepared. PgBouncer gives it one of its own, because it may prepare it
/// in any session.
const NAME: &[&str] = &[concat!(
    "SELECT /* dlock: what is the name of this statement? */ ",
    lines!(
        fact!("id", "pg_catalog.pg_backend_pid()"),
        fact!(
            "prepared",
            "(SELECT pg_catalog.min(p.name) FROM pg_catalog.pg_prepared_statements p WHERE NOT p.from_sql AND \
             pg_catalog.int4gt(pg_catalog.strpos(p.statement, 'dlock: what is the name of this statement?'), 0))"
        )
    )
)];

/// What the server calls itself. Everything that speaks PostgreSQL's protocol understands this.
pub(in crate::postgres) fn version() -> Statement {
    Statement::number(Prepared::Never, &["SELECT pg_catalog.version()"], []).columns(Columns::Text)
}

/// Each with its name. They answer with lines.
pub(in crate::postgres) fn check() -> Vec<(&'static str, Statement)> {
    let ask = |prepared, sql, binds: Option<Bind>| {
        let binds = binds.map_or_else(Binds::default, |bind| Binds::from([bind]));
        Statement::number(prepared, sql, binds).columns(Columns::Text)
    };
    let key = Bind::BigInt(unique_nonzero().get());
    vec![
        ("product", ask(Prepared::Never, PRODUCT, None)),
        ("settings", ask(Prepared::Never, SETTINGS, None)),
        ("role", ask(Prepared::Never, ROLE, None)),
        ("locks", ask(Prepared::Never, LOCKS, Some(key))),
        ("name", ask(Prepared::ByText, NAME, None)),
    ]
}
