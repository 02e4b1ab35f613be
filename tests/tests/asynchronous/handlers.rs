//! What a web service writes compiles: handlers of axum, whose futures have to be `Send`, with each pool.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use diesel::QueryResult;
use diesel_async::pooled_connection::{bb8, deadpool, mobc};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error};

/// The error of a service.
enum ServiceError {
    Busy,
    Other,
}

impl From<diesel::result::Error> for ServiceError {
    fn from(error: diesel::result::Error) -> Self {
        match Error::find(&error) {
            Some(Error::Timeout { .. }) => Self::Busy,
            _ => Self::Other,
        }
    }
}

impl From<ServiceError> for StatusCode {
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::Busy => StatusCode::CONFLICT,
            ServiceError::Other => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

fn failed<E>(_error: E) -> StatusCode {
    StatusCode::INTERNAL_SERVER_ERROR
}

/// The same handlers for a way to get a connection out of a pool.
macro_rules! handlers {
    ($module:ident: $Pool:ty, |$pool:ident| $get:expr) => {
        mod $module {
            use super::*;

            async fn run(State($pool): State<$Pool>) -> Result<(), StatusCode> {
                let mut conn = $get.await.map_err(failed)?;
                let lock = conn.advisory_lock("report");
                let ran = lock.run(async |conn| {
                    conn.batch_execute("SELECT 1").await?;
                    Ok::<_, ServiceError>(())
                });
                Ok(ran.await?)
            }

            async fn run_query(State($pool): State<$Pool>) -> Result<(), StatusCode> {
                let mut conn = $get.await.map_err(failed)?;
                let ran = conn
                    .advisory_lock("report")
                    .run(async |conn| QueryResult::Ok(conn.batch_execute("SELECT 1").await?));
                ran.await.map_err(failed)
            }

            async fn transaction(State($pool): State<$Pool>) -> Result<(), StatusCode> {
                let mut conn = $get.await.map_err(failed)?;
                let lock = conn.advisory_lock("account/1");
                let done = lock.transaction(async |conn| {
                    conn.batch_execute("SELECT 1").await?;
                    Ok::<_, ServiceError>(())
                });
                Ok(done.await?)
            }

            async fn guard(State($pool): State<$Pool>) -> Result<(), StatusCode> {
                let mut conn = $get.await.map_err(failed)?;
                let Some(mut lock) = conn
                    .advisory_lock("report")
                    .try_acquire()
                    .await
                    .map_err(failed)?
                else {
                    return Err(StatusCode::CONFLICT);
                };
                lock.batch_execute("SELECT 1").await.map_err(failed)?;
                lock.release().await.map_err(failed).map(drop)
            }

            async fn owned(State($pool): State<$Pool>) -> Result<(), StatusCode> {
                let conn = $get.await.map_err(failed)?;
                let lock = AdvisoryLock::new(conn, "leader")
                    .acquire()
                    .await
                    .map_err(failed)?;
                lock.release().await.map_err(failed).map(drop)
            }

            async fn owned_run(State($pool): State<$Pool>) -> Result<(), StatusCode> {
                let conn = $get.await.map_err(failed)?;
                let lock = AdvisoryLock::new(conn, "leader");
                lock.run(async |_conn| Ok::<_, anyhow::Error>(()))
                    .await
                    .map_err(failed)
            }

            pub(super) fn routes(pool: $Pool) -> Router {
                Router::new()
                    .route("/run", post(run))
                    .route("/run-query", post(run_query))
                    .route("/transaction", post(transaction))
                    .route("/guard", post(guard))
                    .route("/owned", post(owned))
                    .route("/owned-run", post(owned_run))
                    .with_state(pool)
            }
        }
    };
}

handlers!(bb8_get: bb8::Pool<AsyncPgConnection>, |pool| pool.get());
handlers!(bb8_get_owned: bb8::Pool<AsyncPgConnection>, |pool| pool.get_owned());
handlers!(of_deadpool: deadpool::Pool<AsyncPgConnection>, |pool| pool.get());
handlers!(of_mobc: mobc::Pool<AsyncPgConnection>, |pool| pool.get());

#[test]
fn handlers_of_axum_take_locks_on_connections_of_each_pool() {
    fn is_handler<P>(routes: fn(P) -> Router) -> fn(P) -> Router {
        routes
    }
    is_handler(bb8_get::routes);
    is_handler(bb8_get_owned::routes);
    is_handler(of_deadpool::routes);
    is_handler(of_mobc::routes);
}
