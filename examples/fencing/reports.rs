use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use dlock_diesel::FencingToken;

use crate::support::{Connect, MysqlConnection, PgConnection};

diesel::table! {
    dlock_reports {
        id -> Integer,
        author -> Text,
        fence -> BigInt,
    }
}

/// A table with one report, which remembers the token of the last write.
pub(crate) trait Reports: Connect {
    fn open(&mut self) -> QueryResult<()> {
        self.close()?;
        self.batch_execute(
            "CREATE TABLE dlock_reports (id INT PRIMARY KEY, author TEXT NOT NULL, fence BIGINT NOT NULL)",
        )?;
        self.batch_execute("INSERT INTO dlock_reports VALUES (1, 'nobody', 0)")
    }

    fn close(&mut self) -> QueryResult<()> {
        self.batch_execute("DROP TABLE IF EXISTS dlock_reports")
    }

    /// Writes the report, unless a later holder has written it. Returns how many rows it changed.
    fn write(&mut self, token: FencingToken, author: &str) -> QueryResult<usize>;
    fn author(&mut self) -> QueryResult<String>;
    fn end_session(&mut self, id: i64) -> QueryResult<()>;
}

macro_rules! reports {
    ($Conn:ty, $end_session:literal) => {
        impl Reports for $Conn {
            fn write(&mut self, token: FencingToken, author: &str) -> QueryResult<usize> {
                let token = i64::from(token);
                let report = dlock_reports::table.find(1);
                diesel::update(report.filter(dlock_reports::fence.lt(token)))
                    .set((
                        dlock_reports::author.eq(author),
                        dlock_reports::fence.eq(token),
                    ))
                    .execute(self)
            }

            fn author(&mut self) -> QueryResult<String> {
                let report = dlock_reports::table.find(1);
                report.select(dlock_reports::author).first(self)
            }

            fn end_session(&mut self, id: i64) -> QueryResult<()> {
                self.batch_execute(&format!($end_session, id))
            }
        }
    };
}

reports!(PgConnection, "SELECT pg_terminate_backend({})");
reports!(MysqlConnection, "KILL {}");
