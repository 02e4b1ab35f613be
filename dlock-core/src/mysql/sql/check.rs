//! Questions about the server, the session and the way between. Each answers with lines, of which the first is the tag.

use super::{Text, name};
use crate::mysql::tag::Tag;
use crate::proto::{Binds, Columns, Prepared, Statement, unique};

macro_rules! lines {
    ($($text:expr),* $(,)?) => {
        &[
            explained!("SELECT CONVERT(CONCAT_WS(CHAR(10), CONCAT('tag=', "),
            $($text),*
        ]
    };
}

const SERVER: Text = lines!(
    "), CONCAT('id=', CONNECTION_ID()), CONCAT('version=', VERSION()), CONCAT('comment=', @@version_comment), \
     CONCAT('wait_timeout=', @@session.wait_timeout)) USING utf8mb4)"
);

/// No server knows all of these variables.
const VARIABLES: Text = lines!(
    "), CONCAT('id=', CONNECTION_ID()), (SELECT GROUP_CONCAT(LOWER(v.VARIABLE_NAME), '=', v.VARIABLE_VALUE \
     SEPARATOR 0x0A) \
     FROM /*M! information_schema.GLOBAL_VARIABLES */ /*!80000 performance_schema.global_variables */ v \
     WHERE LOWER(v.VARIABLE_NAME) IN ('read_only', 'wsrep_on', 'group_replication_single_primary_mode', \
     'group_replication_group_name', 'performance_schema', 'idle_transaction_timeout', \
     'idle_write_transaction_timeout', 'idle_readonly_transaction_timeout'))) USING utf8mb4)"
);

/// Takes a lock that nobody else has, looks who has it, and releases it.
const LOCKS: Text = lines!(
    "), CONCAT('id=', CONNECTION_ID()), CONCAT('granted=', GET_LOCK(CONVERT(",
    " USING utf8mb4), 0)), CONCAT('seen=', IS_USED_LOCK(CONVERT(",
    " USING utf8mb4)) <=> CONNECTION_ID()), CONCAT('released=', RELEASE_LOCK(CONVERT(",
    " USING utf8mb4)))) USING utf8mb4)"
);

const WAITING: Text = lines!(
    "), (SELECT CONCAT('locks=', COUNT(*)) FROM performance_schema.metadata_locks m WHERE m.OBJECT_TYPE = 'NONE')) \
     USING utf8mb4)"
);

const PRIVILEGES: Text = lines!(
    "), CONCAT('id=', CONNECTION_ID()), (SELECT CONCAT('process=', COUNT(*)) FROM information_schema.USER_PRIVILEGES p \
     WHERE p.PRIVILEGE_TYPE = 'PROCESS')) USING utf8mb4)"
);

/// Each with its name.
pub(in crate::mysql) fn check(tag: Tag) -> Vec<(&'static str, Statement)> {
    let key = format!("dlock:check:{:016x}", unique());
    let ask = |sql: Text| {
        let mut binds = Binds::from([tag.bind()]);
        for _ in 2..sql.len() {
            binds.push(name(&key));
        }
        Statement::number(Prepared::Never, sql, binds).columns(Columns::Text)
    };
    vec![
        ("server", ask(SERVER)),
        ("variables", ask(VARIABLES)),
        ("locks", ask(LOCKS)),
        ("waiting", ask(WAITING)),
        ("privileges", ask(PRIVILEGES)),
    ]
}

/// Whether this is one of several servers that take writes: 1 or 0. After 0 the statements of this session do not ask
/// again. Everybody may read this table. It takes 1.7 milliseconds, and no `max_execution_time` cuts it short.
pub(in crate::mysql) fn several_writers(tag: Tag) -> Statement {
    const TEXT: Text = &[
        explained!("SELECT /*+ MAX_EXECUTION_TIME(4294967295) */ 4611686018427387904 + CAST("),
        " AS SIGNED) + IF(w.several, 1, (@dlock_one_node := 0)) AS answer FROM (SELECT \
         MAX(v.VARIABLE_NAME = 'wsrep_on' AND v.VARIABLE_VALUE = 'ON') OR \
         (MAX(v.VARIABLE_NAME = 'group_replication_single_primary_mode' AND v.VARIABLE_VALUE = 'OFF') AND \
         MAX(v.VARIABLE_NAME = 'group_replication_group_name' AND v.VARIABLE_VALUE <> '')) AS several \
         FROM performance_schema.global_variables v WHERE v.VARIABLE_NAME IN \
         ('wsrep_on', 'group_replication_single_primary_mode', 'group_replication_group_name')) w",
    ];
    Statement::number(Prepared::Never, TEXT, [tag.bind()])
}
