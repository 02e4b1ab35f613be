//! The keys of other libraries, one file for each.

#[cfg(feature = "distributed-lock")]
mod distributed_lock;
#[cfg(feature = "django-pglock")]
mod django_pglock;
mod mysql_name;
#[cfg(feature = "sqlalchemy-dlock")]
mod sqlalchemy_dlock;
#[cfg(feature = "sqlx")]
mod sqlx;
#[cfg(feature = "with-advisory-lock")]
mod with_advisory_lock;
