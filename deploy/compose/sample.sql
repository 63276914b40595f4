-- A small database to try DataSync with: the airlines of New York's airports, and the weather there in 2013, by the hour.
CREATE TABLE airlines (carrier text PRIMARY KEY, name text NOT NULL);
INSERT INTO airlines VALUES
    ('9E', 'Endeavor Air Inc.'), ('AA', 'American Airlines Inc.'), ('AS', 'Alaska Airlines Inc.'),
    ('B6', 'JetBlue Airways'), ('DL', 'Delta Air Lines Inc.'), ('EV', 'ExpressJet Airlines Inc.'),
    ('F9', 'Frontier Airlines Inc.'), ('FL', 'AirTran Airways Corporation'), ('HA', 'Hawaiian Airlines Inc.'),
    ('MQ', 'Envoy Air'), ('OO', 'SkyWest Airlines Inc.'), ('UA', 'United Air Lines Inc.'),
    ('US', 'US Airways Inc.'), ('VX', 'Virgin America'), ('WN', 'Southwest Airlines Co.'), ('YV', 'Mesa Airlines Inc.');

SELECT setseed(0.2013);
CREATE TABLE weather AS
SELECT origin, time_hour, round((55 + 25 * sin(extract(doy FROM time_hour) / 58 - 2) + 12 * random())::numeric, 2) AS temp,
       round((40 + 55 * random())::numeric, 2) AS humid, (360 * random())::int AS wind_dir
FROM unnest(ARRAY['EWR', 'JFK', 'LGA']) origin,
     generate_series(timestamptz '2013-01-01 01:00-05', timestamptz '2013-12-29 17:00-05', interval '1 hour') time_hour;
ALTER TABLE weather ADD PRIMARY KEY (origin, time_hour);
