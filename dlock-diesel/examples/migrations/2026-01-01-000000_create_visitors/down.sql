DROP TABLE dlock_visitors;
