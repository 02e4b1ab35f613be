CREATE TABLE dlock_visitors (name VARCHAR(100) NOT NULL);
