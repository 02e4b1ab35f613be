use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use crate::support::{Connect, MysqlConnection, PgConnection};

diesel::table! {
    dlock_job_runs (job, period) {
        job -> Text,
        period -> Text,
    }
}

/// A table with a row for each job and period that is done.
pub(crate) trait Runs: Connect {
    fn create_table(&mut self) -> QueryResult<()>;
    fn has_run(&mut self, job: &str, period: &str) -> QueryResult<bool>;
    fn record(&mut self, job: &str, period: &str) -> QueryResult<()>;
}

macro_rules! runs {
    ($Conn:ty, $before:literal, $text:literal) => {
        impl Runs for $Conn {
            fn create_table(&mut self) -> QueryResult<()> {
                self.batch_execute(concat!(
                    $before,
                    "CREATE TABLE IF NOT EXISTS dlock_job_runs (job ",
                    $text,
                    " NOT NULL, period ",
                    $text,
                    " NOT NULL, PRIMARY KEY (job, period))"
                ))
            }

            fn has_run(&mut self, job: &str, period: &str) -> QueryResult<bool> {
                let run = dlock_job_runs::table.find((job, period));
                diesel::select(diesel::dsl::exists(run)).get_result(self)
            }

            fn record(&mut self, job: &str, period: &str) -> QueryResult<()> {
                diesel::insert_into(dlock_job_runs::table)
                    .values((
                        dlock_job_runs::job.eq(job),
                        dlock_job_runs::period.eq(period),
                    ))
                    .execute(self)?;
                Ok(())
            }
        }
    };
}

runs!(PgConnection, "", "TEXT");
// Other collations hold "Report" and "report" for the same.
runs!(
    MysqlConnection,
    "",
    "VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
);
// Another job may be writing its row.
runs!(SqliteConnection, "PRAGMA busy_timeout = 10000; ", "TEXT");
